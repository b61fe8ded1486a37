"""What computing in a format costs: :mod:`.mac`, the LUTs of a multiply-accumulate unit."""
