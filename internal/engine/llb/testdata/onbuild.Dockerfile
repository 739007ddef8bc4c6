FROM onbuild:1
RUN true
