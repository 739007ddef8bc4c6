import sys

from greeter import greet

print("ok" if "--check" in sys.argv else greet("world"))
