"""Class-incremental methods, a file each. Importing the package registers the built-in ones."""

from zeroflow.methods.aper import APERAdapter
from zeroflow.methods.ease import EASE
from zeroflow.methods.method import Method, MethodInfo, methods, register_method
from zeroflow.methods.simplecil import SimpleCIL

__all__ = ["EASE", "APERAdapter", "Method", "MethodInfo", "SimpleCIL", "methods", "register_method"]
