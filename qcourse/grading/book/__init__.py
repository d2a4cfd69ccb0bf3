"""Where grades are kept: result files, nbgrader's gradebook, and tables for other systems."""
