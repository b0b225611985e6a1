"""Readers of weight files, and the published weights of the encoders."""
