"""Prototype modules for weakly supervised and open-vocabulary semantic segmentation."""
