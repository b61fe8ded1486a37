"""The kinds of data source, one a file."""
