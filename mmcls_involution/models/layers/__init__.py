from .involution import Involution2d, InvolutionConv

__all__ = ['Involution2d', 'InvolutionConv']
