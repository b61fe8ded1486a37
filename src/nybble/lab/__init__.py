"""Sweeps: thousands of runs, described once, run once, kept in a database and asked about later.

    a sweep in YAML  --sweep.py-->  RunSpecs (spec.py), each known by the hash of what decides its result
    --store.py-->  a database: SQLite beside you, PostgreSQL for a cluster
    --executors/*-->  workers (worker.py) that claim runs, run them (kinds/*) and keep what came out
    --rows.py-->  tables to query, plot, report, and to carry as Parquet (parquet.py)

It needs SQLAlchemy and Alembic: ``pip install 'nybble[lab]'``.
"""
