"""Laws of precision: closed forms, and fits of a user's own runs."""
