"""Agents: programs that sample a response in several turns, with tools, while every token is recorded as sampled."""
