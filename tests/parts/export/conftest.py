"""What runs in an environment of its own is no test of this one."""

collect_ignore = ["modelopt_peer.py"]
