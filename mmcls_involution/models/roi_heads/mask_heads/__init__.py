from .involution_fcn_mask_head import InvolutionFCNMaskHead

__all__ = ['InvolutionFCNMaskHead']
