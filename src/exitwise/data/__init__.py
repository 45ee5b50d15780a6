"""Loads samples and images from local files, installed packages and public data sets."""
