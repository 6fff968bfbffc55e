"""`weir plan`: what a model needs and where it fits, before anything is started or paid for."""
