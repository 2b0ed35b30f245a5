"""How faithful generated transitions are to the real ones, and to the environment."""
