"""Image models that can be fine-tuned: built-in ones, and diffusers pipelines."""
