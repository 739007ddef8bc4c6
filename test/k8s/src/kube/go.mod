// Not part of the repository's module; build.sh completes it.
module kubebuild
