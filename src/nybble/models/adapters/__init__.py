"""One model family a file; each defines ``PART``, an :class:`nybble.models.adapter.Adapter`."""
