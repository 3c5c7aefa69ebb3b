"""What each kind of operator does to labels; one file per family, found without a list."""
