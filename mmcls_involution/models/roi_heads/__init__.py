from .mask_heads import InvolutionFCNMaskHead

__all__ = ['InvolutionFCNMaskHead']
