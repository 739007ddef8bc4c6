ARG BASE=debian:12
FROM $BASE
ARG V=1
RUN echo $V
ARG HTTP_PROXY
RUN echo proxied
