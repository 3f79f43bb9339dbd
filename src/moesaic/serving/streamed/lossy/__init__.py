"""Modes that make a streamed model read less by changing its output: never on unless asked for, always labelled."""
