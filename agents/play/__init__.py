"""Agents that play: scripted ones, controls of equal compute, a relay, and how a command line names one."""
