"""Devices and processes: the mesh and its shardings, and how processes start, agree and stop together."""
