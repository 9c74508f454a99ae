"""The NumPy golden model of LNPU: what the chip computes, bit for bit, from the specification alone."""

from golden.conv import *
from golden.exact import *
from golden.fgmp import *
from golden.formats import *
from golden.linear import *
from golden.memory import *
