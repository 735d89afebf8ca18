"""Problems on the command line: how they are named, found, made, and changed by options."""
