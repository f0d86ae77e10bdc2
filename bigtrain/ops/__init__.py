"""Operations: a kernel where it wins, and plain torch, which is its meaning and its fallback."""
