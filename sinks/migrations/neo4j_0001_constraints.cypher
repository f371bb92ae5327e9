// One node an operation and a life of a thread, one relationship an edge: what is sent twice is there once.
CREATE CONSTRAINT operation_id IF NOT EXISTS FOR (o:Operation) REQUIRE o.id IS UNIQUE;
CREATE CONSTRAINT task_key IF NOT EXISTS FOR (t:Task) REQUIRE t.key IS UNIQUE;
CREATE CONSTRAINT caused_id IF NOT EXISTS FOR ()-[r:CAUSED]-() REQUIRE r.id IS UNIQUE;
CREATE CONSTRAINT delayed_id IF NOT EXISTS FOR ()-[r:DELAYED]-() REQUIRE r.id IS UNIQUE;
CREATE CONSTRAINT migration_version IF NOT EXISTS FOR (m:Migration) REQUIRE m.version IS UNIQUE;
CREATE INDEX operation_start IF NOT EXISTS FOR (o:Operation) ON (o.start_mono_ns);
CREATE INDEX operation_status IF NOT EXISTS FOR (o:Operation) ON (o.status);
CREATE INDEX task_comm IF NOT EXISTS FOR (t:Task) ON (t.comm);
CREATE INDEX caused_operation IF NOT EXISTS FOR ()-[r:CAUSED]-() ON (r.operation_id);
