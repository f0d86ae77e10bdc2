"""Operations below the techniques: what a kernel may one day do faster, in plain torch."""
