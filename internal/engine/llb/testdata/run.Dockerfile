FROM debian:12
ENV A=1
USER www-data
WORKDIR /srv
RUN echo one
RUN ["echo", "two"]
RUN --network=none true
CMD ["sh"]
