"""What can be wrong with a data set, looked for before a run or in full."""
