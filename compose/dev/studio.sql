-- What the example follows. The image of PostgreSQL runs it once, on an empty volume.
CREATE TABLE movie (id bigint PRIMARY KEY, title text NOT NULL, released date);
INSERT INTO movie SELECT id, 'Movie ' || id, date '1942-11-26' + id::int FROM generate_series(1, 1000) AS id;
CREATE DATABASE delta_state; -- sidecars and workers share it
