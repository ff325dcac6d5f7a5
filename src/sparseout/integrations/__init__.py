"""Callbacks for training frameworks, each in a module that needs its framework: `lightning`, `transformers`."""
