import com.fasterxml.jackson.core.JsonProcessingException;
import com.fasterxml.jackson.databind.ObjectMapper;
import java.net.URI;
import java.util.Collection;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import org.apache.kafka.common.config.ConfigDef;
import org.apache.kafka.connect.connector.Task;
import org.apache.kafka.connect.data.Struct;
import org.apache.kafka.connect.errors.ConnectException;
import org.apache.kafka.connect.sink.SinkConnector;
import org.apache.kafka.connect.sink.SinkRecord;
import org.apache.kafka.connect.sink.SinkTask;
import redis.clients.jedis.Jedis;
import redis.clients.jedis.Pipeline;

/** What Kafka Connect costs at least: the columns that the benchmark's processor takes, one pipeline per batch. */
public final class RedisSink extends SinkConnector {
  private Map<String, String> settings = Map.of();

  @Override
  public void start(Map<String, String> given) {
    settings = given;
  }

  @Override
  public Class<? extends Task> taskClass() {
    return Writer.class;
  }

  @Override
  public List<Map<String, String>> taskConfigs(int most) {
    return List.of(settings);
  }

  @Override
  public void stop() {}

  @Override
  public ConfigDef config() {
    return new ConfigDef().define("redis.url", ConfigDef.Type.STRING, ConfigDef.Importance.HIGH, "Where it writes.");
  }

  @Override
  public String version() {
    return "1";
  }

  /** Its only task. */
  public static final class Writer extends SinkTask {
    /** By the names that Delta's connector gives them in Avro. */
    private static final Map<String, String> COLUMNS = new LinkedHashMap<>();

    static {
      for (String plain : List.of("id", "title", "year", "rating")) {
        COLUMNS.put(plain, plain);
      }
      COLUMNS.put("studio_u005fid", "studio_id");
      COLUMNS.put("updated_u005fat", "updated_at");
    }

    private final ObjectMapper json = new ObjectMapper();
    private Jedis client;

    @Override
    public void start(Map<String, String> settings) {
      client = new Jedis(URI.create(settings.get("redis.url")));
    }

    @Override
    public void put(Collection<SinkRecord> records) {
      if (records.isEmpty()) {
        return;
      }
      Pipeline pipeline = client.pipelined();
      for (SinkRecord record : records) {
        if (record.value() instanceof Struct event) {
          write(pipeline, event);
        }
      }
      pipeline.sync();
    }

    private void write(Pipeline pipeline, Struct event) {
      Struct row = event.getStruct("after");
      if (row == null) {
        pipeline.del("movie:" + event.getStruct("before").get("id"));
        return;
      }
      Map<String, Object> document = new LinkedHashMap<>();
      COLUMNS.forEach((name, column) -> document.put(column, row.get(name)));
      try {
        pipeline.set(("movie:" + row.get("id")).getBytes(), json.writeValueAsBytes(document));
      } catch (JsonProcessingException error) {
        throw new ConnectException(error);
      }
    }

    @Override
    public void stop() {
      client.close();
    }

    @Override
    public String version() {
      return "1";
    }
  }
}
