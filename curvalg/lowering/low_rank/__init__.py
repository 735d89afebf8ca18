"""Matrices V Vᵀ with few columns: V by layers, the Gram matrix, the kernel."""
