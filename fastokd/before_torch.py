"""Sets what torch and other libraries read of the environment when they are loaded."""

from fastokd import caches, cpus, user

user.make_known()
cpus.settle()
caches.settle()
