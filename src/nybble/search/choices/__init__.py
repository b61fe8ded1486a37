"""Networks that hold all of a space: what stands in a block's place, whose turn it is, and how it is taught."""
