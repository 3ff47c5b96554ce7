"""The tests mirror the package; `zoo` has the models, `strategies` draws models and programs."""
