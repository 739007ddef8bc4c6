FROM debian:12
RUN echo first
RUN --mount=type=secret,id=token make
