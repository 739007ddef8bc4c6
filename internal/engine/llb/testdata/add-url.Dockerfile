FROM debian:12
ADD https://example.com/file /file
