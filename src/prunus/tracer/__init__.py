"""Watch a model run once and write down what hangs together."""
