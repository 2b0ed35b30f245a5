"""Larger data sets from those there are: synthetic transitions (SynthER), and how faithful they are."""
