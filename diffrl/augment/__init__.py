"""Generators that enlarge data sets, and reports on what they make."""
