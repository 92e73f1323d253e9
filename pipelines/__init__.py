"""Runs both stages. The only place that owns disk, devices, data sets and the command line."""
