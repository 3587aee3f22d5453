"""Run a prompt over every row of a table, and account for every cent."""

__version__ = "0.1.0"
