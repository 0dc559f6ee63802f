"""What the example scripts share: arguments, presets of the papers, methods, data, training and evaluation."""
