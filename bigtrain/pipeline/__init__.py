"""Pipeline parallelism: a model split across ranks by layers, run by a schedule that is data."""
