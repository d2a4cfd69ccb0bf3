"""Where grades are kept: files of results, the gradebook of nbgrader, and the tables that other systems read."""
