"""Communicators: one file for each back end; launch.py opens the right one."""
