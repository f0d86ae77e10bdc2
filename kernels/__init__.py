"""C++ and CUDA sources with a plain C interface, and how they are built (`build.py`)."""
