"""Agents that play: scripted ones, controls of equal compute, and how a command line names one."""
