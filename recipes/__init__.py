"""Recipes as package data, found by :func:`dysurgery.train.load_recipe`."""
