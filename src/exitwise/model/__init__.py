"""Loads vision-language models, and reads their image encoders at exits."""
