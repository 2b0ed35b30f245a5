"""Many runs read together: one table of their scores, its statistics, tables, figures and page."""
